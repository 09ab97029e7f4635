"""Callbacks that run a CSQ search inside the trainers of other libraries; each module needs its library installed."""
