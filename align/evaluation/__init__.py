"""Measures policies and reward models: held-out win rates, implicit rewards, calibration."""
