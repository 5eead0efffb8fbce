//! The few shapes that the plots are made of, as SVG text.

use std::fmt::Write;

/// Where a text stands against its point.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// How a line is drawn.
#[derive(Clone, Copy)]
pub(super) struct Stroke {
    pub(super) color: &'static str,
    pub(super) width: f64,
    pub(super) dashed: bool,
}

impl Stroke {
    pub(super) fn new(color: &'static str, width: f64) -> Self {
        Self { color, width, dashed: false }
    }

    pub(super) fn dashed(self) -> Self {
        Self { dashed: true, ..self }
    }
}

/// Text of a picture; a shape is drawn over those before it.
pub(super) struct Svg {
    text: String,
}

pub(super) const INK: &str = "#1f2328";
pub(super) const FAINT: &str = "#656d76";
pub(super) const GRID: &str = "#e4e7eb";

impl Svg {
    pub(super) fn new(width: f64, height: f64) -> Self {
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        );
        Self { text }
    }

    pub(super) fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }

    pub(super) fn line(&mut self, points: &[(f64, f64)], stroke: Stroke) {
        let mut path = String::new();
        for (x, y) in points {
            let _ = write!(path, "{x:.1},{y:.1} ");
        }
        let dash = if stroke.dashed { " stroke-dasharray=\"4 3\"" } else { "" };
        let _ = writeln!(
            self.text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{}\" stroke-linejoin=\"round\"{dash}/>",
            path.trim_end(),
            stroke.color,
            stroke.width
        );
    }

    pub(super) fn bar(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), color: &str) {
        let _ = writeln!(
            self.text,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{color}\"/>",
            width.max(0.5)
        );
    }

    pub(super) fn label(&mut self, (x, y): (f64, f64), anchor: Anchor, color: &str, text: &str) {
        self.words((x, y), anchor, &format!("fill=\"{color}\""), text);
    }

    pub(super) fn heading(&mut self, (x, y): (f64, f64), size: u32, text: &str) {
        self.words((x, y), Anchor::Start, &format!("fill=\"{INK}\" font-size=\"{size}\" font-weight=\"bold\""), text);
    }

    fn words(&mut self, (x, y): (f64, f64), anchor: Anchor, style: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let _ = writeln!(self.text, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{text}</text>");
    }
}
