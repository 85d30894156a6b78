"""What guesses the words of a draft model, one file each."""
