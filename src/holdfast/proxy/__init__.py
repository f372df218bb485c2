"""Data in which a harmless topic stands for harm, so that a real model can be hardened and attacked without any."""
