"""What the transformer's blocks are made of: norms, linears, and linears in int8."""
