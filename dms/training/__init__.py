"""What only training needs: packed attention, offloading, sharded weights. An export carries none of it."""
