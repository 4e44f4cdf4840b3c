"""PTX on the CPU: what Triton compiles for a GPU is run instruction by instruction, and watched.

Triton's interpreter runs the source of a kernel; this runs what the compiler made of it, with its asynchronous copies,
its shared memory and its barriers. A block is run alone, its 32-lane warps one after the other, in an order that is
drawn anew at each barrier. Every draw comes from a seed, which is in the text of what was found.

Refused with a `Fault`: an access that is not aligned to its size, or outside the memory that was given, or a store to
memory that may only be read; a branch on which the lanes of a warp part; a barrier that not all warps reach, or at
which they wait in different places; a program that does not end; where the host writes meanwhile, a read that a cache
may answer. Told as hazards at the end: in shared memory, bytes that one thread writes and another touches without a
barrier between them, in whatever order the warps ran; bytes touched while an asynchronous copy to them has not been
waited for. Such bytes are NaN until the copy lands, which is when it is issued, when it is waited for, or either by
chance. Shared memory and registers that nobody wrote are NaN as well.

Not checked: time, caches, what registers and shared memory a GPU has; races in global memory; the order in which others
see what was stored, beyond that volatile reads see what the host has written by then. `ex2.approx`, `div.full` and
`fma` are computed with more digits than a GPU's. An instruction that is not known is an `UnknownInstruction`, when the
program is read: there are those that the kernels of this project need, and no tensor cores.
"""
