//! From values to places on paper, and the values worth a mark.

/// An axis, linear or logarithmic.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Scale {
    /// From 0 to at least `high`.
    pub(super) fn linear(high: f64, (from, to): (f64, f64)) -> Self {
        let high = if high > 0.0 && high.is_finite() { high } else { 1.0 };
        Self { low: 0.0, high, from, to, logarithmic: false }
    }

    /// From `low` to `high`, both above 0.
    pub(super) fn logarithmic(low: f64, high: f64, (from, to): (f64, f64)) -> Self {
        let low = low.max(1e-9);
        Self { low, high: high.max(low * 10.0), from, to, logarithmic: true }
    }

    pub(super) fn at(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + (self.to - self.from) * share.clamp(0.0, 1.0)
    }

    /// Round values within the scale, about `count` of them on a linear one.
    pub(super) fn ticks(&self, count: usize) -> Vec<f64> {
        if self.logarithmic {
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let wide = self.high / self.low > 2e3;
            let steps: &[f64] = if wide { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let values = decades.flat_map(|decade| steps.iter().map(move |step| step * 10_f64.powi(decade)));
            return values.filter(|value| (self.low * 0.999..=self.high * 1.001).contains(value)).collect();
        }
        let raw = (self.high - self.low) / count.max(1) as f64;
        let magnitude = 10_f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|s| s * magnitude).find(|s| *s >= raw).unwrap_or(raw);
        let ticks = (self.high / step).floor() as u32;
        (0..=ticks).map(|tick| f64::from(tick) * step).collect()
    }
}

/// A number without digits that say nothing.
pub(super) fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 || size == 0.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_within_the_scale() {
        assert_eq!(Scale::linear(9.3, (0.0, 1.0)).ticks(5), [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(Scale::logarithmic(0.05, 2.0, (0.0, 1.0)).ticks(5).len(), 6);
        for high in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(Scale::linear(high, (0.0, 1.0)).at(1.0), 1.0, "{high}");
        }
    }

    #[test]
    fn values_outside_stay_on_the_edge() {
        let scale = Scale::logarithmic(1.0, 100.0, (0.0, 10.0));
        for (value, expect) in [(-1.0, 0.0), (1.0, 0.0), (10.0, 5.0), (100.0, 10.0), (1e9, 10.0)] {
            assert!((scale.at(value) - expect).abs() < 1e-9, "{value}");
        }
    }

    #[test]
    fn numbers_are_short() {
        for (value, expect) in [(0.0, "0"), (1234.5, "1234"), (12.0, "12"), (1.25, "1.25"), (0.05, "0.05")] {
            assert_eq!(short(value), expect);
        }
    }
}
