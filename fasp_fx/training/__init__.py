"""Choosing by gradients (gates), and regaining by them (recovery)."""
