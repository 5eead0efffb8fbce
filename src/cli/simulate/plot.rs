//! The pictures of a report: per rate, how long requests waited (distribution), the policies side by side with the spread
//! of the seeds, and how many waited over time.
//!
//! A policy keeps its colour in all pictures. Equal cells give equal bytes.

mod scale;
mod svg;

use forebay_simulator::{Cell, Outcome, Policy, Settings, What};

use self::scale::{Scale, short};
use self::svg::{Anchor, FAINT, GRID, INK, Stroke, Svg};

const COLORS: [&str; 9] =
    ["#0b5fff", "#9aa0a6", "#c58b5a", "#b5a642", "#8e6bbf", "#2a9d8f", "#d1495b", "#e08e2b", "#5b8c3a"];
/// Points of a curve.
const POINTS: usize = 240;
const SECOND_MS: f64 = 1e3;

/// The cells of one rate.
pub(super) struct Group<'a> {
    /// As in `trace.jsonl.gz, 8 workers, load 0.75 (rate 1.5)`.
    pub(super) title: String,
    pub(super) settings: &'a Settings,
    pub(super) outcomes: Vec<&'a Outcome>,
}

/// One policy's cells, one a seed.
struct Series<'a> {
    name: &'static str,
    color: &'static str,
    outcomes: Vec<&'a Outcome>,
}

struct Curve {
    name: &'static str,
    color: &'static str,
    points: Vec<(f64, f64)>,
}

impl<'a> Group<'a> {
    /// In the order of the policies.
    fn series(&self) -> Vec<Series<'a>> {
        let of = |name| self.outcomes.iter().filter(|outcome| outcome.cell.policy == name).copied().collect();
        let all = Policy::all().iter().zip(COLORS);
        let all = all.map(|(policy, color)| Series { name: policy.name(), color, outcomes: of(policy.name()) });
        all.filter(|series| !series.outcomes.is_empty()).collect()
    }

    fn curves(&self, points: impl Fn(&[&Outcome]) -> Vec<(f64, f64)>) -> Vec<Curve> {
        let curve = |Series { name, color, outcomes }| Curve { name, color, points: points(&outcomes) };
        self.series().into_iter().map(curve).collect()
    }
}

/// The plot area of a picture with axes.
struct Frame {
    svg: Svg,
    x: Scale,
    y: Scale,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 430.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 690.0;
const TOP: f64 = 76.0;
const BOTTOM: f64 = 376.0;

impl Frame {
    fn new(title: &str, subtitle: &str, (x, x_name): (Scale, &str), (y, y_unit): (Scale, &str)) -> Self {
        let mut svg = Svg::new(WIDTH, HEIGHT);
        svg.heading((LEFT, 26.0), 15, title);
        svg.label((LEFT, 45.0), Anchor::Start, FAINT, subtitle);
        for tick in y.ticks(5) {
            svg.line(&[(LEFT, y.at(tick)), (RIGHT, y.at(tick))], Stroke::new(GRID, 1.0));
            svg.label((LEFT - 8.0, y.at(tick) + 4.0), Anchor::End, FAINT, &format!("{}{y_unit}", short(tick)));
        }
        for tick in x.ticks(8) {
            svg.line(&[(x.at(tick), BOTTOM), (x.at(tick), BOTTOM + 5.0)], Stroke::new(FAINT, 1.0));
            svg.label((x.at(tick), BOTTOM + 20.0), Anchor::Middle, FAINT, &short(tick));
        }
        svg.line(&[(LEFT, BOTTOM), (RIGHT, BOTTOM)], Stroke::new(FAINT, 1.0));
        svg.label(((LEFT + RIGHT) / 2.0, BOTTOM + 42.0), Anchor::Middle, INK, x_name);
        Self { svg, x, y }
    }

    /// Draws curves, the first over the others, and names them on the right.
    fn curves(mut self, curves: &[Curve]) -> String {
        for (index, curve) in curves.iter().enumerate().rev() {
            let points: Vec<_> = curve.points.iter().map(|(x, y)| (self.x.at(*x), self.y.at(*y))).collect();
            self.svg.line(&points, Stroke::new(curve.color, if index == 0 { 2.6 } else { 1.4 }));
        }
        for (Curve { name, color, .. }, row) in curves.iter().zip(0..) {
            let y = TOP + 10.0 + 20.0 * f64::from(row);
            self.svg
                .line(&[(RIGHT + 18.0, y), (RIGHT + 42.0, y)], Stroke::new(color, if row == 0 { 3.2 } else { 2.2 }));
            self.svg.label((RIGHT + 50.0, y + 4.0), Anchor::Start, INK, name);
        }
        self.svg.finish()
    }
}

/// Share of requests whose first token came within a time; a request that never got one stays out of the share.
pub(super) fn ttft(group: &Group<'_>) -> String {
    let curves = group.curves(distribution);
    let times = || curves.iter().flat_map(|curve| curve.points.iter().map(|(time, _)| *time));
    let low = times().fold(f64::INFINITY, f64::min).clamp(0.01, 1e6);
    let high = times().fold(0.1, f64::max);
    let x = Scale::logarithmic(low, high, (LEFT, RIGHT));
    let y = Scale::linear(100.0, (BOTTOM, TOP));
    let axis = (x, "time to first token, s (logarithmic)");
    let mut frame = Frame::new("Share of requests whose first token came within a time", &group.title, axis, (y, " %"));
    let slo = group.settings.slo_ttft.as_secs_f64();
    frame.svg.line(&[(x.at(slo), TOP), (x.at(slo), BOTTOM)], Stroke::new(FAINT, 1.0).dashed());
    frame.svg.label((x.at(slo), TOP - 6.0), Anchor::Middle, FAINT, &format!("SLO {} s", short(slo)));
    frame.curves(&curves)
}

fn distribution(outcomes: &[&Outcome]) -> Vec<(f64, f64)> {
    let mut times: Vec<f64> = outcomes.iter().flat_map(|outcome| waits(outcome)).collect();
    times.sort_by(f64::total_cmp);
    let requests: u32 = outcomes.iter().map(|outcome| outcome.cell.requests).sum();
    let share = |rank: usize| rank as f64 * 100.0 / f64::from(requests.max(1));
    let ranks = (0..=POINTS).map(|point| (times.len() * point).div_ceil(POINTS).max(1));
    ranks.filter_map(|rank| Some((*times.get(rank - 1)?, share(rank)))).collect()
}

/// Seconds from arrival to first token.
fn waits(outcome: &Outcome) -> Vec<f64> {
    let mut arrived = vec![forebay_scheduler::Tick::ZERO; outcome.cell.requests as usize];
    let mut waits = Vec::with_capacity(arrived.len());
    for entry in &outcome.log {
        match (entry.what, arrived.get_mut(entry.request as usize)) {
            (What::Arrived, Some(at)) => *at = entry.at,
            (What::FirstToken { .. }, Some(at)) => waits.push(entry.at.seconds_since(*at)),
            _ => {}
        }
    }
    waits
}

/// Requests without a first token over time, of the first seed.
pub(super) fn waiting(group: &Group<'_>) -> String {
    let ends = group.series().into_iter().filter_map(|series| Some(series.outcomes.first()?.cell.virtual_seconds));
    let end = ends.fold(0.0, f64::max);
    let curves = group.curves(|seeds| seeds.first().map_or(Vec::new(), |first| waiting_over_time(first, end)));
    let most = curves.iter().flat_map(|curve| curve.points.iter().map(|(_, waiting)| *waiting)).fold(1.0, f64::max);
    let x = Scale::linear(end, (LEFT, RIGHT));
    let y = Scale::linear(most, (BOTTOM, TOP));
    Frame::new("Requests that wait for their first token", &group.title, (x, "time, s"), (y, "")).curves(&curves)
}

/// The most that waited at once, in each of equal parts of the time until `end`.
fn waiting_over_time(outcome: &Outcome, end: f64) -> Vec<(f64, f64)> {
    let mut started = vec![false; outcome.cell.requests as usize];
    let mut most = vec![0_i32; POINTS];
    let (mut now, mut last) = (0_i32, 0);
    for entry in &outcome.log {
        let at = entry.at.seconds_since(forebay_scheduler::Tick::ZERO) / end.max(1e-9) * POINTS as f64;
        let at = (at as usize).min(POINTS - 1);
        for point in most.iter_mut().take(at + 1).skip(last + 1) {
            *point = now;
        }
        last = at;
        let Some(started) = started.get_mut(entry.request as usize) else { continue };
        match entry.what {
            What::Arrived => now += 1,
            What::FirstToken { .. } => {
                now -= 1;
                *started = true;
            }
            what if what.is_end() && !*started => now -= 1,
            _ => {}
        }
        if let Some(point) = most.get_mut(at) {
            *point = (*point).max(now);
        }
    }
    let time = |point: usize| (point as f64 + 0.5) * end / POINTS as f64;
    most.into_iter().enumerate().map(|(point, waiting)| (time(point), f64::from(waiting))).collect()
}

/// Four panels of bars, one bar a policy: mean over the seeds, and the least and the most of them.
pub(super) fn summary(group: &Group<'_>) -> String {
    type Figure = fn(&Cell) -> Option<f64>;
    let panels: [(&str, Figure); 4] = [
        ("mean time to first token, s", |cell| Some(cell.ttft_ms?.mean / SECOND_MS)),
        ("99th percentile of it, s", |cell| Some(cell.ttft_ms?.p99 / SECOND_MS)),
        ("requests within the SLO, %", |cell| Some(cell.within_slo * 100.0)),
        ("prompt tokens found in a cache, %", |cell| Some(cell.hit_ratio_tokens? * 100.0)),
    ];
    let series = group.series();
    let panel_height = 20.0 * series.len() as f64 + 62.0;
    let mut svg = Svg::new(WIDTH, 70.0 + 2.0 * panel_height);
    svg.heading((24.0, 26.0), 15, "Policies side by side");
    svg.label(
        (24.0, 45.0),
        Anchor::Start,
        FAINT,
        &format!("{}; bar: mean of the seeds, line: least and most", group.title),
    );
    for ((name, figure), place) in panels.into_iter().zip([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]) {
        let values = |series: &Series<'_>| series.outcomes.iter().filter_map(|outcome| figure(&outcome.cell)).collect();
        let rows: Vec<_> = series.iter().map(|series| (series.name, series.color, values(series))).collect();
        panel(&mut svg, (24.0 + place.0 * 420.0, 76.0 + place.1 * panel_height), name, &rows);
    }
    svg.finish()
}

fn panel(svg: &mut Svg, (left, top): (f64, f64), name: &str, rows: &[(&str, &str, Vec<f64>)]) {
    const NAMES: f64 = 112.0;
    const BARS: f64 = 230.0;
    let most = rows.iter().flat_map(|(_, _, values)| values.iter().copied()).fold(0.0, f64::max);
    let x = Scale::linear(most, (left + NAMES, left + NAMES + BARS));
    svg.heading((left, top + 6.0), 12, name);
    for ((policy, color, values), row) in rows.iter().zip(0..) {
        let y = top + 18.0 + 20.0 * f64::from(row);
        svg.label((left + NAMES - 8.0, y + 11.0), Anchor::End, INK, policy);
        if values.is_empty() {
            svg.label((left + NAMES + 4.0, y + 11.0), Anchor::Start, FAINT, "none");
            continue;
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        svg.bar((x.at(0.0), y), (x.at(mean) - x.at(0.0), 14.0), color);
        if values.len() > 1 {
            svg.line(&[(x.at(low), y + 7.0), (x.at(high), y + 7.0)], Stroke::new(INK, 1.5));
        }
        svg.label((x.at(high).max(x.at(mean)) + 6.0, y + 11.0), Anchor::Start, INK, &short(mean));
    }
}
