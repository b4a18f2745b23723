"""Images from weights, features, the Fréchet distance with its fingerprint, and NFE x BNR surfaces."""
