"""The kernels of fusemlp: one contract, and a backend for each kind of machine.

``backend(name, device, precision)`` loads a backend; nothing is imported before it is asked for. ``TRAITS`` says
what each is like, also where it cannot run.
"""

from __future__ import annotations

from fusemlp_kernels.registry import TRAITS, availability, backend, choose

__all__ = ["TRAITS", "availability", "backend", "choose"]
