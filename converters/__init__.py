"""PyTorch to ONNX to quantized ONNX, and back to a differentiable shadow; knows nothing of backdoors or data sets."""
