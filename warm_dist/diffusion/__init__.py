"""The mathematics: blur, paths, process, heads, loss and samplers. Tensors in, tensors out."""
