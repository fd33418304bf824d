"""Model families: detection, the map checkpoint rows <-> module, and the pipeline to run them.

Import from the modules: `hswq.models.map` is plain data, and loading it must not load torch.
"""
