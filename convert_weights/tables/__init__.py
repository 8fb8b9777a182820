"""What each published layout calls each parameter, and how it lays it out: facts, as rows.

Every module has `rows(config)`, the table; `axis_sizes(config)`, the lengths of the axes the rows
name; and `NAMINGS`, the layouts it knows, the first one being the one that is written by default.
`PREFIXES` are what other programs put in front of the names, longest first; `TIED` are second names
of a tensor that some files store twice; `BUFFERS` are tensors that some files carry and that are no
parameters of the network; `OTHER_NETWORKS` are the beginnings of names of networks that share a
file with ours and that FLUX does not use.
"""

from convert_weights.tables import clip, mmdit, t5, vae

TABLES = {"mmdit": mmdit, "vae": vae, "t5": t5, "clip": clip}

__all__ = ["TABLES", "clip", "mmdit", "t5", "vae"]
