"""Adapters from model families to the Tower protocol."""
