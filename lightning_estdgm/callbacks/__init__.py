"""The Lightning callbacks: hooks and delegation only; nothing below this package imports lightning."""
