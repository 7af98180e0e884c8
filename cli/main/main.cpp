#include "cli/cli.hpp"

int main(int argc, char** argv) { return bulkhead::cli::main(argc, argv); }
