"""Taking a mixture of voices apart: data, training, and jobs over files of any length."""
