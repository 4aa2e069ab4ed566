"""Frozen answers: inputs and correctly rounded results as plain files, and what makes and checks them."""
