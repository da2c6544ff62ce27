"""An emulator of the PTX that Triton emits for sm_80 and sm_90, in NumPy, from NVIDIA's "PTX ISA".

``parse`` reads the text; ``opcodes`` has the arithmetic, ``matrix`` the instructions of warps, ``warpgroup`` wgmma,
``copies`` cp.async, mbarriers and the copies of tensors, ``strong`` what orders memory between blocks; ``memory``
checks each access, ``order`` its order; ``schedule`` runs the threads; ``driver`` is a Triton driver, so that the
engine's launches run unchanged.

All threads of several blocks run an instruction as one vector. These stop a kernel, with its line of Python: an address
outside the allocations or misaligned; shared memory that is read before it is written, or while a copy into it is under
way; races through shared memory, between blocks or between launches through global memory; a missing release, acquire
or fence; a barrier that some threads do not reach; an mbarrier whose arrivals or bytes do not come; a loop without an
end; an instruction that the emulator does not know.

It cannot show
- time, occupancy, registers and spills: ptxas is not run, and PTX is not what a card executes;
- the values that a weak order of memory gives: every access is done in order, and what the rules do not order is found
  from the rules of ``order``, ``memory`` and ``warpgroup``;
- the bits of approximate functions (``ex2.approx``, ``div.full``): they are rounded as NumPy's;
- the sums inside a tensor core: an instruction's sum is exact and cut off once;
- a missing ``bar.warp.sync``: the threads of a warp run in step;
- clusters and tcgen05: the kernels for sm_80 and sm_90 use none. On sm_100 only the tiles of 16 rows, whose products
  are mma.sync, run. Of tensor copies it has those of matrices from global memory, by maps that the host makes.
"""
