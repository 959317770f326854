"""User histories: what people will want next, and lists of it for all of them."""
