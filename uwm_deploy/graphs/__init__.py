"""ONNX graphs: passes that keep weight names, and the fingerprint of the edit."""
