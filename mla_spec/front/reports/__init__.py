"""What is made of records once a run is over: Markdown, HTML, JUnit XML, annotations, a statement of conformance."""
