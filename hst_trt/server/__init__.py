"""Pictures over HTTP: a request's fields, its drawing, the queue, and the application; read in this order."""
