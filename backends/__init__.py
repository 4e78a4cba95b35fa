"""What one array library does in its own way, one thin file a library; installed as `peftarray.backends`.

The rules that a backend obeys:

- Nothing imports a backend by a statement. It is found by name among the entry points of the group
  `peftarray.backends`, so a library that is not asked for is never loaded, and another package can bring a backend.
- It is the only place that imports its library. It imports no other backend.
- It holds what the array API standard leaves out (gradients, compilation, checkpointing, devices, arrays from bytes and
  back) and no mathematics: a formula is written once, against the standard, and knows no backend.
- It may import anything of `peftarray`. No file of `peftarray` asks which backend it has.
- It never copies an array to the host unasked, and never changes a global setting of its library on import.
"""
