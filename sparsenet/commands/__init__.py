"""The commands of ``sparsenet``, a module each: ``add_arguments`` adds its flags, ``run`` carries it out."""
