"""Operators: plain torch, the reference, beside the binding of its compiled kernel."""
