"""Weights in and out of other libraries' formats, checked logit by logit."""
