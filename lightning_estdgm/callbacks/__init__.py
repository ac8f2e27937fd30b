"""Lightning callbacks: hooks and delegation only. The packages that they delegate to do not import Lightning."""
