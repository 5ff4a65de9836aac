"""What a candidate costs on the device, measured; the machine's own peak and bandwidth; profile and waterline."""
