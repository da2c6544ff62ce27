"""The memory of one call's operands on a device: the same views there, filled and read back as a whole."""

import numpy as np
from memory import base_of, position

COMPUTE_OPERANDS = frozenset(
    ("x", "gathered", "y", "z", "dz", "dz_prev", "dx", "dy", "adv", "start", "w_shadow", "shadow")
)
LOOPS = frozenset({"train_resident", "train_fleet"})
READS_WEIGHTS = frozenset({"linear", "linear_loss_grad", "grad_input", "linear_members", "grad_input_members"})


class DeviceMemory:
    """The memory of the operands of one call of ``op``, in arrays of ``backend``."""

    def __init__(self, backend, op):
        self.backend, self.op = backend, op
        self.flats = {}

    def view(self, name, array):
        base = base_of(array)
        key = base.__array_interface__["data"][0] if base.size else id(array)
        owned = getattr(base, "owned", None)
        if key not in self.flats:
            kind = "compute" if getattr(base, "compute", False) else self._kind(name, base.dtype)
            self.flats[key] = base, self._flat(base, kind, owned is not None)
        flat = self.flats[key][1]
        if owned is not None:
            offset, shape, pitch = owned
            return self.backend.view(flat, offset, shape, pitch)
        first, strides = position(array, base)
        return self._strided(flat, array.shape, strides, first)

    def _kind(self, name, dtype):
        if self.op in LOOPS:
            # what is of that type says so
            return "real" if dtype in (np.float16, np.float32) else str(np.dtype(dtype))
        compute = name in COMPUTE_OPERANDS or (name == "w" and self.op in READS_WEIGHTS)
        compute |= self.op == "add"
        # coordinates are read in float32 in every precision
        compute &= (self.op, name) != ("encode", "x")
        if dtype in (np.float16, np.float32):
            return "compute" if compute else "real"
        return str(np.dtype(dtype))

    def _flat(self, base, kind, owned):
        """Memory in the backend's own arrays."""
        return self.backend.allocate(base.size, kind)

    def _strided(self, flat, shape, strides, first):
        return self.backend.strided(flat, first, shape, strides)

    def upload(self):
        for base, flat in self.flats.values():
            self.backend.copy_into(flat, np.array(base))

    def download(self):
        for base, flat in self.flats.values():
            base[...] = self.backend.to_host(flat)


class TorchMemory(DeviceMemory):
    """Memory in torch tensors."""

    def _flat(self, base, kind, owned):
        import torch

        flat = super()._flat(base, kind, owned)
        return flat if owned else torch.empty_like(flat)

    def _strided(self, flat, shape, strides, first):
        import torch

        return torch.as_strided(flat, shape, strides, first)

    def upload(self):
        import torch

        for base, flat in self.flats.values():
            flat.copy_(torch.from_numpy(np.array(base)))
            if flat.dtype == torch.bfloat16:
                # a conversion may give any NaN, and the bits are compared
                flat.masked_fill_(flat.isnan(), np.nan)

    def download(self):
        for base, flat in self.flats.values():
            host = flat.cpu()
            base[...] = (host.float() if base.dtype == np.float32 else host).numpy()
