//! Series that are gone with what they tell of.
//!
//! Not in the recorder of the other metrics, which keeps every series for ever: workers, models and GPUs come and go. Here
//! a thing's values are its own, and what is told is what there is.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{Counter, Gauge, Histogram, HistogramFn};
use parking_lot::Mutex;

/// All series of one name.
pub(super) struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    /// With the upper bounds of its buckets.
    Histogram(&'static [f64]),
}

impl Family {
    pub(super) const fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, help, kind: Kind::Counter }
    }

    pub(super) const fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, help, kind: Kind::Gauge }
    }

    pub(super) const fn histogram(name: &'static str, help: &'static str, bounds: &'static [f64]) -> Self {
        Self { name, help, kind: Kind::Histogram(bounds) }
    }
}

/// The series of one thing.
pub(super) struct Series {
    /// What all of them bear, as in `worker="a"`.
    labels: String,
    all: Mutex<Vec<One>>,
}

struct One {
    family: &'static Family,
    labels: String,
    value: Value,
}

enum Value {
    Count(Arc<AtomicU64>),
    /// The bits of a number.
    Number(Arc<AtomicU64>),
    Spread(Arc<Buckets>),
}

impl Series {
    pub(super) fn new(labels: &[(&str, &str)]) -> Self {
        Self { labels: pairs(labels), all: Mutex::default() }
    }

    pub(super) fn counter(&self, family: &'static Family, labels: &[(&str, &str)]) -> Counter {
        let cell = Arc::new(AtomicU64::new(0));
        self.add(family, labels, Value::Count(Arc::clone(&cell)));
        Counter::from_arc(cell)
    }

    /// Starts at `value`; it is not told of while that is not a number.
    pub(super) fn gauge(&self, family: &'static Family, labels: &[(&str, &str)], value: f64) -> Gauge {
        let cell = Arc::new(AtomicU64::new(value.to_bits()));
        self.add(family, labels, Value::Number(Arc::clone(&cell)));
        Gauge::from_arc(cell)
    }

    pub(super) fn histogram(&self, family: &'static Family, labels: &[(&str, &str)]) -> Histogram {
        let bounds = if let Kind::Histogram(bounds) = family.kind { bounds } else { &[] };
        let buckets = Arc::new(Buckets::new(bounds));
        self.add(family, labels, Value::Spread(Arc::clone(&buckets)));
        Histogram::from_arc(buckets)
    }

    fn add(&self, family: &'static Family, labels: &[(&str, &str)], value: Value) {
        let own = pairs(labels);
        let comma = if self.labels.is_empty() || own.is_empty() { "" } else { "," };
        self.all.lock().push(One { family, labels: format!("{}{comma}{own}", self.labels), value });
    }
}

/// The text of these things' series (Prometheus exposition format 0.0.4), a family after the other. Of two things that
/// bear the same labels the first is told.
pub(super) fn render<'a>(things: impl IntoIterator<Item = &'a Series>) -> String {
    let mut things: Vec<&Series> = things.into_iter().collect();
    things.sort_by(|a, b| a.labels.cmp(&b.labels));
    things.dedup_by(|b, a| a.labels == b.labels);
    let mut families: BTreeMap<&str, (&Family, String)> = BTreeMap::new();
    for thing in things {
        for one in &*thing.all.lock() {
            if !matches!(&one.value, Value::Number(bits) if f64::from_bits(bits.load(Ordering::Acquire)).is_nan()) {
                let (_, text) = families.entry(one.family.name).or_insert_with(|| (one.family, String::new()));
                one.write(text);
            }
        }
    }
    let mut text = String::new();
    for (name, (family, lines)) in families {
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        let _ = write!(text, "# HELP {name} {}\n# TYPE {name} {kind}\n{lines}\n", family.help);
    }
    text
}

impl One {
    fn write(&self, text: &mut String) {
        let Self { family: Family { name, .. }, labels, value } = self;
        let _ = match value {
            Value::Count(count) => writeln!(text, "{name}{{{labels}}} {}", count.load(Ordering::Acquire)),
            Value::Number(bits) => {
                writeln!(text, "{name}{{{labels}}} {}", f64::from_bits(bits.load(Ordering::Acquire)))
            }
            Value::Spread(buckets) => buckets.write(text, name, labels),
        };
    }
}

/// A histogram's samples, counted as they come.
struct Buckets {
    bounds: &'static [f64],
    /// One more than there are bounds.
    counts: Box<[AtomicU64]>,
    /// The bits of a number.
    sum: AtomicU64,
}

impl Buckets {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), sum: AtomicU64::new(0) }
    }

    fn write(&self, text: &mut String, name: &str, labels: &str) -> std::fmt::Result {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut bounds = self.bounds.iter();
        let mut samples = 0;
        for count in &self.counts {
            samples += count.load(Ordering::Relaxed);
            let bound = bounds.next().map_or_else(|| "+Inf".to_owned(), f64::to_string);
            writeln!(text, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {samples}")?;
        }
        writeln!(text, "{name}_sum{{{labels}}} {}", f64::from_bits(self.sum.load(Ordering::Relaxed)))?;
        writeln!(text, "{name}_count{{{labels}}} {samples}")
    }
}

impl HistogramFn for Buckets {
    fn record(&self, value: f64) {
        let at = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        if let Some(count) = self.counts.get(at) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let more = |bits| Some((f64::from_bits(bits) + value).to_bits());
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }
}

fn pairs(labels: &[(&str, &str)]) -> String {
    let pair = |(name, value): &(&str, &str)| format!("{name}=\"{}\"", escaped(value));
    labels.iter().map(pair).collect::<Vec<_>>().join(",")
}

/// A label's value.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    static UP: Family = Family::gauge("up", "whether");
    static BREAKS: Family = Family::counter("breaks_total", "how often");
    static SECONDS: Family = Family::histogram("seconds", "how long", &[0.5, 1.0]);

    #[test]
    fn families_stand_together_and_things_apart() {
        let (one, two) = (Series::new(&[("of", "b \"\\\n")]), Series::new(&[("of", "a")]));
        let up = [one.gauge(&UP, &[], 0.0), two.gauge(&UP, &[], f64::NAN)];
        one.counter(&BREAKS, &[("kind", "gap")]).increment(3);
        let seconds = two.histogram(&SECONDS, &[("api", "chat")]);
        [0.25, 0.5, 0.75, 8.0].into_iter().for_each(|sample| seconds.record(sample));
        let same = Series::new(&[("of", "a")]);
        same.counter(&BREAKS, &[]).increment(1);
        let text = render([&one, &two, &same]);
        let expect = r#"# HELP breaks_total how often
# TYPE breaks_total counter
breaks_total{of="b \"\\\n",kind="gap"} 3

# HELP seconds how long
# TYPE seconds histogram
seconds_bucket{of="a",api="chat",le="0.5"} 2
seconds_bucket{of="a",api="chat",le="1"} 3
seconds_bucket{of="a",api="chat",le="+Inf"} 4
seconds_sum{of="a",api="chat"} 9.5
seconds_count{of="a",api="chat"} 4

# HELP up whether
# TYPE up gauge
up{of="b \"\\\n"} 0

"#;
        assert_eq!(text, expect);
        up[1].set(1.0);
        assert!(render([&two]).contains("up{of=\"a\"} 1\n"), "it is told once it is a number");
        assert_eq!(render([]), "");
    }
}
