//! Calls the library, which contains the program.

fn main() -> std::process::ExitCode {
    loopctl::main()
}
