"""What every room uses: files written whole, errors as sentences, checks of settings and inputs, command lines."""
