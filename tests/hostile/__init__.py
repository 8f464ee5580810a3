"""What a hostile author writes, by kind."""
