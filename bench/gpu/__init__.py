"""Everything measured on a GPU, in one program: ``python -m bench.gpu``; bench/README.md says how to run it.

``plan`` names the sections, ``runner`` runs them in processes that can be lost, ``run`` is what a section writes with,
``clocks`` times. The sections stand in ``card``, ``ops``, ``head``, ``models``, ``correct``, ``checks``, ``trainings``
and ``learning``; ``report`` writes docs/gpu.md from what they left.
"""
