"""Forecasting: models, windows, scaling, a Lightning task and a predictor."""
