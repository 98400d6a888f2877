"""Pure: who holds which elements, and which rank orthogonalizes which matrix. No torch, no communication."""
