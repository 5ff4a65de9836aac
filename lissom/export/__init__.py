"""From a Plan to an Artifact: one exporter a runtime, precision by module path, verification on real inputs."""
