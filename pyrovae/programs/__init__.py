"""Any Pyro pair: its parameters, what it refers to, and its gradients as a compiled graph. Knows no VAE."""
