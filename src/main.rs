//! The `warpo` command; all of it is in [`warpo::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    warpo::cli::run()
}
