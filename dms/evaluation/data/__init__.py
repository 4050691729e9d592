"""What evaluation documents are made of: text, names, planted tasks, problems."""
