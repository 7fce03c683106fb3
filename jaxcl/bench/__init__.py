"""What a method's step costs beside a plain one, measured in turn in one process. `jaxcl bench` prints it."""
