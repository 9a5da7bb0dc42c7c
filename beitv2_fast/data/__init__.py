from ..errors import require

for _package in ("numpy", "PIL"):  # which the modules here import at their top
    require(_package, "train", "Reading images")
