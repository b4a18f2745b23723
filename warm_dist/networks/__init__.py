"""The U-Nets, published weights they accept, and what they cost."""
