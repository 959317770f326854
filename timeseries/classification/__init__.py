"""Which class a series is of: data, training and prediction on the encoders of the forecasters."""
