"""The towers, the co-attention fusion, the decoders and heads, and the models made of them."""
