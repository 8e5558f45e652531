//! The number of rounds and the seed of a randomized test.

use std::str::FromStr;

/// `LOOPD_TEST_SEED` and `LOOPD_TEST_ROUNDS` repeat or lengthen a test.
const SEED: &str = "LOOPD_TEST_SEED";
const ROUNDS: &str = "LOOPD_TEST_ROUNDS";

/// A number from the environment; `None` if it is not set or not a number.
#[must_use]
pub fn from_environment<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// The random numbers and the number of rounds of a test. Prints both so that a failed run can be repeated.
#[must_use]
pub fn of(test: &str, default: u64) -> (fastrand::Rng, u64) {
    let rounds = from_environment(ROUNDS).unwrap_or(default);
    (seeded(test, &format!(" {ROUNDS}={rounds}")), rounds)
}

/// Whether the number of rounds is set: such a run may take long.
#[must_use]
pub fn is_set() -> bool {
    std::env::var_os(ROUNDS).is_some()
}

/// The random numbers of a test without rounds.
#[must_use]
pub fn random(test: &str) -> fastrand::Rng {
    seeded(test, "")
}

fn seeded(test: &str, rounds: &str) -> fastrand::Rng {
    let seed = from_environment(SEED).unwrap_or_else(|| fastrand::u64(..));
    println!("{test}: {SEED}={seed}{rounds}");
    fastrand::Rng::with_seed(seed)
}
