"""One thin module per DVC stage: params + one function of `dino` + files + tracking."""
