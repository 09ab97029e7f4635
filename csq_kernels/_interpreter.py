"""Refuses to be imported where torch would hang: in a sub-interpreter."""

import ctypes

_current, _main = ctypes.pythonapi.PyInterpreterState_Get, ctypes.pythonapi.PyInterpreterState_Main
_current.restype = _main.restype = ctypes.c_void_p
if _current() != _main():
    raise ImportError("expected the main interpreter, which torch needs, got a sub-interpreter: use a process instead")
