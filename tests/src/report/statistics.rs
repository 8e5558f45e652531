//! Medians, percentiles and ratios.

use std::time::Duration;

/// Measured values of one quantity, all in the same unit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    sorted: Vec<f64>,
}

impl Samples {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        let at = self.sorted.partition_point(|other| *other <= value);
        self.sorted.insert(at, value);
    }

    /// The number of values.
    #[must_use]
    pub fn count(&self) -> usize {
        self.sorted.len()
    }

    /// The value that half of the values do not exceed; the mean of the two in the middle of an even number.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        let upper = *self.sorted.get(self.sorted.len() / 2)?;
        let is_odd = self.sorted.len() % 2 == 1;
        Some(if is_odd { upper } else { f64::midpoint(self.sorted[self.sorted.len() / 2 - 1], upper) })
    }

    /// The smallest value that `percent` of 100 values do not exceed (nearest rank).
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Option<f64> {
        let rank = (self.sorted.len() * percent).div_ceil(100).max(1);
        self.sorted.get(rank - 1).copied()
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut samples = Self::default();
        values.into_iter().for_each(|value| samples.add(value));
        samples
    }
}

/// A duration in milliseconds.
#[must_use]
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// How many times `base` a value is; `None` if one of them is missing, or the base is not positive.
#[must_use]
pub fn ratio(value: Option<f64>, base: Option<f64>) -> Option<f64> {
    let base = base.filter(|base| *base > 0.0)?;
    Some(value? / base)
}

/// A figure at the start and at the end of a growth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    /// The first value.
    pub first: f64,
    /// The last value.
    pub last: f64,
}

impl Growth {
    /// How many times the first value the last one would be if the floor, which is a part of both, had not grown;
    /// `None` if the first value is not positive.
    #[must_use]
    pub fn above(self, floor: Self) -> Option<f64> {
        ratio(Some(self.last - (floor.last - floor.first)), Some(self.first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        values.iter().copied().collect()
    }

    #[test]
    fn median_is_in_the_middle() {
        assert_eq!(samples(&[]).median(), None);
        assert_eq!(samples(&[7.0]).median(), Some(7.0));
        assert_eq!(samples(&[9.0, 1.0, 5.0]).median(), Some(5.0));
        assert_eq!(samples(&[4.0, 1.0, 2.0, 9.0]).median(), Some(3.0));
    }

    #[test]
    fn percentiles_have_the_nearest_rank() {
        let hundred = samples(&(1..=100).rev().map(f64::from).collect::<Vec<_>>());
        assert_eq!(hundred.count(), 100);
        let found = [0, 1, 50, 95, 100].map(|percent| hundred.percentile(percent));
        assert_eq!(found, [1.0, 1.0, 50.0, 95.0, 100.0].map(Some));
        assert_eq!(samples(&[3.0, 1.0, 2.0]).percentile(95), Some(3.0));
        assert_eq!(samples(&[]).percentile(95), None);
    }

    #[test]
    fn ratio_needs_a_positive_base() {
        assert_eq!(ratio(Some(3.0), Some(2.0)), Some(1.5));
        for (value, base) in [(None, Some(2.0)), (Some(3.0), None), (Some(3.0), Some(0.0))] {
            assert_eq!(ratio(value, base), None);
        }
    }

    #[test]
    fn growth_of_the_floor_is_taken_off() {
        let floor = Growth { first: 1.0, last: 4.0 };
        assert_eq!(Growth { first: 2.0, last: 5.0 }.above(floor), Some(1.0));
        assert_eq!(Growth { first: 2.0, last: 6.0 }.above(floor), Some(1.5));
        assert_eq!(Growth { first: 0.0, last: 6.0 }.above(floor), None);
    }

    #[test]
    fn durations_are_in_milliseconds() {
        assert_eq!(milliseconds(Duration::from_micros(1500)), 1.5);
    }
}
