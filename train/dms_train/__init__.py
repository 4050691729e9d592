"""The retrofit: recipe -> data -> step -> loop -> artifact."""
